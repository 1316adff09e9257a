"""From a recipe file to a published folder: calibrate, quantize to several formats, evaluate, gate, publish."""
