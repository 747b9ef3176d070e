"""What became of a model: one self-contained HTML page, and a model card. `facts` measures, `page` and `card` write."""

from __future__ import annotations

from anybit.reporting.card import write_card
from anybit.reporting.facts import Facts, brief, first_words, gather
from anybit.reporting.page import write_page

__all__ = ["Facts", "brief", "first_words", "gather", "write_card", "write_page"]
