"""The embedded engine: transformers' OpenAI-compatible server running this project's INT8 layer.

It builds on classes of that server which transformers does not promise to keep, so importing it checks their version.
"""

from importlib.metadata import PackageNotFoundError, version

from w8a8.errors import MissingExtraError

TRANSFORMERS = "5.23"
"""The version whose server this engine builds on; the extra `serve` in pyproject.toml asks for the same.

5.24 renamed the method behind `/v1/models`: move on by reading the differences in `transformers.cli.serving`,
`transformers.cache_utils` and `transformers.core_model_loading`, and by running tests/serve/embedded.
"""


def check_transformers() -> None:
    """Raise MissingExtraError if another version of transformers is installed; a missing one is the import's error."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return
    if found.split(".")[:2] != TRANSFORMERS.split("."):
        raise MissingExtraError(
            f"transformers {found} is installed, and the transformers engine builds on the server of {TRANSFORMERS}; "
            f"install that one: pip install 'transformers[serving]=={TRANSFORMERS}.*'"
        )


check_transformers()
