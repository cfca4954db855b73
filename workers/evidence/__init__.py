"""What is measured on data for one checkpoint: Gram matrices of inputs, Fisher information, K-FAC's factors, mean gradients.

Used from outside: `measure` (a statistic of a model and arrays), `Inputs` (the arrays, checked), `Asked` (the parameters).
"""

from workers.evidence.asked import Asked, Inputs
from workers.evidence.measure import Measured, Where, measure

__all__ = ["Asked", "Inputs", "Measured", "Where", "measure"]
