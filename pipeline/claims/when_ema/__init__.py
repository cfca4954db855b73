"""The study of configs/studies/when_ema: when does ema -> ema beat fine-tuning?

`design` defines what is run, `pieces` runs it, `recording` and `numbers` keep the results; `measures` and `hypotheses` judge the
kept numbers alone.
"""
