"""Rows of any known shape, read, checked and turned into token ids with a loss mask.

Reading order: sources (which files) → reading (files to rows) → shapes (rows to conversations) → encode (conversations
to tokens; with template, masks, control, truncation) → store (tokens on disk) → load (all of it) → report.
"""
