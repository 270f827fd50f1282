"""Other ways to put the same model behind HTTP, each following the advice of its own documentation.

All accept the same upload (multipart, field `file`) on POST /predict and answer
{"predictions": [{"class_id": 207, "confidence": 0.85}, …]}: five of them, highest first.
"""
