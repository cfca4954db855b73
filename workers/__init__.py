"""The part that needs torch: data, models, training, scoring, and thin Ray actors around them."""

from merge_service.moved import lead

lead()
