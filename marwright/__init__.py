"""The library behind every command: learning → packing → release."""
