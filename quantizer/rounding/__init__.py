"""Codes by rounding: grids, GPTQ, the columns that get more bits."""
