"""Operators of Paddle: quantized."""

from slimgraph.importers.paddle.row import Row

ROWS: tuple[Row, ...] = ()
