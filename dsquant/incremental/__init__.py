"""Requantizes a new release of a model: changed weights under the recorded scales, everything else reused."""
