"""The pocket world: a tiny real text-to-image model with its scenes and preference pairs."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
