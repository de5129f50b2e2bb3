"""Answer images with a file, on an emulated processor: needs NumPy and the runtime, nothing of this package.

python emulated.py onnx|ncnn|litert FILE images.npy logits.npy
"""

import sys

import numpy as np


def onnx(file):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    running = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    entry = running.get_inputs()[0].name
    return lambda image: running.run(None, {entry: image})[0]


def ncnn(file):
    import ncnn

    network = ncnn.Net()
    network.opt.num_threads = 1
    for name in ("packed", "storage", "arithmetic"):
        setattr(network.opt, f"use_fp16_{name}", False)
    assert network.load_param(f"{file}.param") == network.load_model(f"{file}.bin") == 0

    def answer(image):
        run = network.create_extractor()
        run.input("in0", ncnn.Mat(image[0]).clone())
        return np.array(run.extract("out0")[1])[None]

    return answer


def litert(file):
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=file, num_threads=1)
    run.allocate_tensors()

    def answer(image):
        run.set_tensor(run.get_input_details()[0]["index"], image)
        run.invoke()
        return run.get_tensor(run.get_output_details()[0]["index"])

    return answer


if __name__ == "__main__":
    kind, file, images, output = sys.argv[1:]
    answer = {"onnx": onnx, "ncnn": ncnn, "litert": litert}[kind](file)
    np.save(output, np.concatenate([answer(image[None]) for image in np.load(images)]))
