"""The specification's part 10, cross-device learning on phones: its listed tests under their names."""

from __future__ import annotations
