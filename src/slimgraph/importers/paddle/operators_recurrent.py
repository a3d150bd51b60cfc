"""Operators of Paddle: recurrent."""

from slimgraph.importers.paddle.row import Row

ROWS: tuple[Row, ...] = ()
