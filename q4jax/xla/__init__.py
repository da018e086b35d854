"""The implementation "xla": every op in plain XLA, on any platform."""
