"""Carries the corpus out with mergekit, in an environment that has it, and writes the numbers that the tests compare with.

    python -m tests.pipeline.recipes.reference tests/golden/mergekit.safetensors    (mergekit 0.1.5, torch on the CPU)

Recipes whose first comment line says `# refused` or `# random` have no reference. Invariant: nothing of this project's merging is
imported here.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from tests.pipeline.recipes.tiny import write_models

CORPUS = Path(__file__).parent / "corpus"


def main(out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    out = out.absolute()
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        write_models(Path())
        for path in sorted(CORPUS.glob("*.yml")):
            text = path.read_text()
            if text.startswith(("# refused", "# random", "# ours")):
                continue
            documents = [one for one in yaml.safe_load_all(text) if one]
            for tree in documents:
                target = tree.pop("name", None) or "out"
                run_merge(
                    MergeConfiguration.model_validate(tree),
                    target,
                    MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
                )
            made: dict[str, np.ndarray] = {}
            for shard in sorted(Path("out").glob("*.safetensors")):
                made |= load_file(shard)
                shard.unlink()
            found |= {f"{path.stem}:{tensor}": values for tensor, values in made.items()}
            print(path.stem, len(made))
    save_file(found, out, {"made_by": "mergekit 0.1.5"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
