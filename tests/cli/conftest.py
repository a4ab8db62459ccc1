"""What the tests of the command share."""

from tests.examples.conftest import model

__all__ = ["model"]
