"""When does ema -> ema beat fine-tuning? The study of configs/studies/when_ema: its pieces, its numbers, its verdicts, its page.

`design` says what is run, `pieces` runs it, `recording` and `numbers` keep what it found, `measures` and `hypotheses` judge the kept numbers alone.
"""
