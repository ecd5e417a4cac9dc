"""How each format is loaded on a phone, for the model card: Kotlin, Swift, Python, C++.

samples/ holds whole programs; these are their few lines that touch the runtime.
"""

from collections.abc import Mapping
from string import Template
from typing import Any

READER = """
from classify import Classifier  # in this folder; needs numpy and $package

found = Classifier(".").predict(images)  # uint8 ($picture)
print(found["label"], found["probabilities"])
"""
NO_ANDROID = "Core ML runs only on Apple devices; on Android use another export."
SNIPPETS: dict[str, dict[str, str]] = {
    ".pte": {
        "Kotlin": """
// implementation("org.pytorch:executorch-android:1.5.1")
val module = Module.load(path)
val input = $executorch_kotlin
val $output = module.forward(EValue.from(input))[0].toTensor().dataAsFloatArray
""",
        "Swift": """
import ExecuTorch  // github.com/pytorch/executorch, branch swiftpm-1.5.1, iOS 17
// Also link backend_xnnpack, kernels_optimized and kernels_quantized, with -all_load.

let module = Module(filePath: path)
let $output: Tensor<Float> = try module.forward(Tensor<$swift>($values, shape: [$shape]))
""",
        "Python": READER,
        "C++": """
// Link the XNNPACK backend and the optimized and quantized kernels in full: see samples/cpp.
executorch::extension::Module module("$file");
auto input = executorch::extension::from_blob($values.data(), {$shape}$executorch_type);
auto result = module.forward(input);
const float* $output = result->at(0).toTensor().const_data_ptr<float>();
""",
    },
    ".onnx": {
        "Kotlin": """
// implementation("com.microsoft.onnxruntime:onnxruntime-android:1.31.1")
val environment = OrtEnvironment.getEnvironment()
val session = environment.createSession(path)
val input = $onnx_kotlin
val $output = session.run(mapOf("$input" to input)).use { (it[0].value as Array<FloatArray>)[0] }
""",
        "Swift": """
import OnnxRuntimeBindings  // github.com/microsoft/onnxruntime-swift-package-manager

let env = try ORTEnv(loggingLevel: .warning)
let session = try ORTSession(env: env, modelPath: path, sessionOptions: nil)
// data is an NSMutableData of $values; the tensor retains it without copying
let input = try ORTValue(tensorData: data, elementType: .$onnx_swift, shape: [$shape])
let found = try session.run(
    withInputs: ["$input": input], outputNames: ["$output"], runOptions: nil)
let $output = try found["$output"]!.tensorData() as Data  // of Float
""",
        "Python": READER,
        "C++": """
Ort::Env environment;
Ort::Session session(environment, "$file", Ort::SessionOptions{});
const std::array<int64_t, 4> shape{$shape};
const char *inputs[] = {"$input"}, *outputs[] = {"$output"};
auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
auto input = Ort::Value::CreateTensor<$c>(memory, $values.data(), $values.size(), shape.data(), 4);
auto found = session.Run(Ort::RunOptions{}, inputs, &input, 1, outputs, 1);
const float* $output = found[0].GetTensorData<float>();
""",
    },
    ".tflite": {
        "Kotlin": """
// implementation("com.google.ai.edge.litert:litert:2.3.0")
val interpreter = Interpreter(File(path))
val $output = Array(1) { FloatArray($classes) }
interpreter.run($values, $output)  // a direct ByteBuffer in nativeOrder(), shape ($shape)
""",
        "Swift": """
import TensorFlowLite  // CocoaPods: TensorFlowLiteSwift

let interpreter = try Interpreter(modelPath: path)
try interpreter.allocateTensors()
try interpreter.copy(data, toInputAt: 0)
try interpreter.invoke()
let $output = try interpreter.output(at: 0).data  // of Float
""",
        "Python": READER,
        "C++": """
auto model = tflite::FlatBufferModel::BuildFromFile("$file");
tflite::ops::builtin::BuiltinOpResolver operators;
std::unique_ptr<tflite::Interpreter> interpreter;
tflite::InterpreterBuilder(*model, operators)(&interpreter);
interpreter->AllocateTensors();
std::copy($values.begin(), $values.end(), interpreter->typed_input_tensor<$c>(0));
interpreter->Invoke();
const float* $output = interpreter->typed_output_tensor<float>(0);
""",
    },
    ".mlpackage": {
        "Kotlin": NO_ANDROID,
        "Swift": """
import CoreML  // iOS 16, macOS 13 and later

let model = try await MLModel(contentsOf: MLModel.compileModel(at: url))
let input = try MLDictionaryFeatureProvider(dictionary: ["$input": value])
let $output = try model.prediction(from: input).featureValue(for: "$output")!
""",
        "Python": "Only on a Mac: `coremltools.models.MLModel(path).predict`.",
        "C++": "Call Core ML from Objective-C++; see the Swift example.",
    },
}
PACKAGES = {
    ".pte": "executorch",
    ".onnx": "onnxruntime",
    ".tflite": "ai-edge-litert",
}
FLOATS = {
    "values": "values",
    "c": "float",
    "swift": "Float",
    "onnx_swift": "float",
    "executorch_type": "",
    "executorch_kotlin": "Tensor.fromBlob(values, longArrayOf($shape))",
    "onnx_kotlin": (
        "OnnxTensor.createTensor(environment, FloatBuffer.wrap(values), longArrayOf($shape))"
    ),
}
PIXELS = {
    "values": "pixels",
    "c": "uint8_t",
    "swift": "UInt8",
    "onnx_swift": "uInt8",
    "executorch_type": ", executorch::aten::ScalarType::Byte",
    "executorch_kotlin": "Tensor.fromBlobUnsigned(pixels, longArrayOf($shape))",
    "onnx_kotlin": (
        "OnnxTensor.createTensor(\n"
        "    environment, ByteBuffer.wrap(pixels), longArrayOf($shape), OnnxJavaType.UINT8)"
    ),
}


def loading(suffix: str, form: Mapping[str, Any]) -> dict[str, str]:
    """Lines that load and call a file, by language.

    Args:
        suffix: The file's, with its dot.
        form: What preprocessing.json holds.
    """
    picture = form["picture"]
    shape = ", ".join(
        str(size) if isinstance(size, int) else "1" for size in form["input"]["shape"]
    )
    words = {
        "file": form["file"],
        "package": PACKAGES.get(suffix, ""),
        "picture": f"N, {picture['height']}, {picture['width']}, {picture['channels']}",
        "input": form["input"]["name"],
        "output": form["output"]["name"],
        "shape": shape,
        "classes": form["output"]["shape"][-1],
    }
    for name, text in (PIXELS if form["inside_the_graph"] else FLOATS).items():
        words[name] = Template(text).safe_substitute(words)
    return {
        language: Template(text).substitute(words).strip()
        for language, text in SNIPPETS[suffix].items()
    }
