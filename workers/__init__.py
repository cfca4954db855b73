"""What needs torch: data, models, training and scoring, and the thin Ray actors that carry them out."""

from merge_service.moved import lead

lead()
