"""What several pipelines share: results over seeds, and pages in HTML and Markdown."""
