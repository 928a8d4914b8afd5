"""One module per chapter of ``fastseq demo``; see ``fastseq.demo``."""
