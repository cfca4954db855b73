"""Carries the recipes over vocabularies out with mergekit, in an environment that has it, and writes the numbers to compare with.

    python -m tests.pipeline.recipes.reference_words tests/golden/mergekit_words.safetensors    (mergekit 0.1.5, torch on the CPU)

Invariant: nothing of this project's merging is imported here.
"""

import os
import sys
import tempfile
from pathlib import Path

import yaml
from safetensors.numpy import save_file

from tests.pipeline.recipes.worded import RECIPES, by_token, write_worded


def main(out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    out, found = out.absolute(), {}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        write_worded(Path())
        for recipe, text in RECIPES.items():
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            run_merge(config, recipe, MergeOptions(write_model_card=False, quiet=True))
            for shard in Path(recipe).glob("*.safetensors"):
                shard.rename(Path(recipe) / "model.safetensors")
            found |= {
                f"{recipe}:{tensor}": values.copy() for tensor, values in by_token(Path(recipe)).items()
            }
            print(recipe, len(found))
    save_file(found, out, {"made_by": "mergekit 0.1.5"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
