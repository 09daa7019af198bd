"""Pages for a browser, each opened from disk without any outside asset: templates, and data embedded safely."""
