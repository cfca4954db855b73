"""What is measured on data for one checkpoint: Gram matrices of inputs, Fisher information, K-FAC's factors, mean gradients.

Used from outside: `measure` (a statistic of a model and arrays), `Inputs` (the arrays, checked), `Asked` (the parameters),
`tasks` (the rows of a task as arrays, and the measurements of a study).
"""

from workers.evidence.asked import Asked, Inputs
from workers.evidence.measure import Measured, Where, measure

__all__ = ["Asked", "Inputs", "Measured", "Where", "measure"]
