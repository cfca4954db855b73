"""The command that loads an adapter or a model into a running server.

Invariant: as for `pipeline.cli`, importing this module stays cheap.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, print_json


def publish(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder of an adapter or a model; for llama.cpp a GGUF file."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="vllm|sglang|llamacpp", help="The kind of server.")],
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="Where it listens, e.g. http://127.0.0.1:8000.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="Its name before the digits of its content, by default the folder's. For llama.cpp a model of a router.",
            show_default=False,
        ),
    ] = None,
    there: Annotated[
        str | None,
        typer.Option(
            "--there",
            metavar="PATH",
            help="The path of the same files as the server sees them, if it is another.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key-from",
            metavar="VARIABLE",
            help="The environment variable with the server's bearer token.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load an adapter or a merged model into a running vLLM, SGLang or llama.cpp, under a name that says its content.

    Example: temporal-merge publish merged-adapter --to vllm --url http://127.0.0.1:8000
    """
    from pipeline.merging.publish import Publication
    from pipeline.merging.publish import publish as load

    found = load(Publication(source, to, url, name, there, key))
    if as_json:
        print_json({"name": found.name, "request": found.request, "answer": found.answer})
    else:
        print(f"{found.name}: loaded by {url} ({found.request})")
