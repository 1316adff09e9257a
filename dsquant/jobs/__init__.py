"""An output folder that belongs to one job: lock, journal, ranks, what the machine has for it."""
