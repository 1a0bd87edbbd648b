"""The audit: what is wrong with a checkpoint's files, found before an engine starts.

It reads headers, scales and text files with NumPy; neither torch nor vLLM is imported.
"""
