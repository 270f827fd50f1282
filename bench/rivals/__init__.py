"""Other ways to put the same model behind HTTP, each as its own documentation would have it done well.

All take the same upload (multipart, field `file`) on POST /predict, and answer
{"predictions": [{"class_id": 207, "confidence": 0.85}, …]}, five of them, highest first.
"""
