"""How scales, foldings and codes are chosen: one decoder layer at a time, in memory, on its calibration inputs."""
