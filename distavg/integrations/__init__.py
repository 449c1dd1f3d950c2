"""Drop-ins for systems that a whole training script is written around.

`EMAOptimizer` here; Composer's algorithms in `distavg.integrations.composer`.
"""

from distavg.integrations.ema_optimizer import EMAOptimizer

__all__ = ["EMAOptimizer"]
