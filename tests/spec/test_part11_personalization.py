"""The specification's tests of part 11: personalisation."""

from __future__ import annotations
