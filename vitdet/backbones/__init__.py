"""Room 2: backbones, one file a family."""
