"""Operators of Paddle: resize."""

from slimgraph.importers.paddle.row import Row

ROWS: tuple[Row, ...] = ()
