"""The embedded engine: an OpenAI-compatible server for models of transformers with this project's INT8 layer.

It builds on parts that transformers does not promise to keep, so importing it checks their version.
"""

from importlib.metadata import PackageNotFoundError, version

from w8a8.errors import MissingExtraError

TRANSFORMERS = "5.23"
"""The version that this engine builds on; the extra `serve` in pyproject.toml asks for the same.

Move on by reading the differences in `transformers.cli.serving`, `transformers.cache_utils`,
`transformers.utils.chat_template_utils`, `transformers.utils.chat_parsing` and `transformers.core_model_loading`, and
by running tests/serve/embedded.
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
