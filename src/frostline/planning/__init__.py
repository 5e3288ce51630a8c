"""What a recipe's run would take, from a few measured steps (``frostline plan``, docs/plan.md)."""

from frostline.planning.courses import foresee
from frostline.planning.forecast import ALONE, Forecast, Prediction, forecast
from frostline.planning.steps import Measured, measure_steps

__all__ = ["ALONE", "Forecast", "Measured", "Prediction", "forecast", "foresee", "measure_steps"]
