"""Measurements: one file each, run as `python -m bench.<name>`; results/ has what they printed."""
