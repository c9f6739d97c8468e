"""The README of the service is made from the models that it describes."""

from tests.support.write_tables import BLOCKS, README, with_tables


def test_the_tables_of_options_and_settings_are_current() -> None:
    text = README.read_text()
    assert all(f"<!-- {name}: begin -->" in text for name in BLOCKS)
    assert with_tables(text) == text, "run python -m tests.support.write_tables"
