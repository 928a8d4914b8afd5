"""The documentation: pages in Markdown, and what draws their tables and plots from the rows of the benchmarks."""
