"""Conversion of common sources (chats, instructions, questions, plain text) to parallel JSONL."""
