"""Operators of Paddle: vision."""

from slimgraph.importers.paddle.row import Row

ROWS: tuple[Row, ...] = ()
