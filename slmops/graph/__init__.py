"""What is in an ONNX decoder graph, and how is it built, read and rewritten?"""
