"""The storage manager: boundary activations are kept, and the frozen prefix is skipped."""

from frostline.cache.manager import MODES, CacheManager, check_cache

__all__ = ["MODES", "CacheManager", "check_cache"]
