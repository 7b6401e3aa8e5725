"""What a run records about itself: its directory, log, progress, throughput, profiles, trackers and pages."""
