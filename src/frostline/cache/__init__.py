"""The storage manager: boundary activations are kept, and the frozen prefix is skipped."""

from frostline.cache.ahead import watched
from frostline.cache.manager import CacheManager
from frostline.cache.options import CacheOptions, CacheSetting, cache_options

__all__ = ["CacheManager", "CacheOptions", "CacheSetting", "cache_options", "watched"]
