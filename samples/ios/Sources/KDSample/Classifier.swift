import CoreGraphics
import CoreML
import CoreVideo
import ExecuTorch
import Foundation

/// The predicted label and its probability.
public struct Guess {
    public let label: String
    public let probability: Float
}

public enum ClassifierError: Error {
    case unreadablePicture
    case otherLabels
}

/// An exported file, loaded in its runtime.
public protocol Classifier {
    var bundle: ModelBundle { get }
    func scores(of picture: CGImage) throws -> [Float]
}

extension Classifier {
    public func classify(_ picture: CGImage) throws -> Guess {
        let scores = try scores(of: picture)
        guard scores.count == bundle.labels.count else { throw ClassifierError.otherLabels }
        let probabilities = bundle.form.insideTheGraph ? scores : softmax(scores)
        let best = probabilities.indices.max { probabilities[$0] < probabilities[$1] }!
        return Guess(label: bundle.labels[best], probability: probabilities[best])
    }

    func pixels(of picture: CGImage) throws -> [UInt8] {
        guard let pixels = bundle.pixels(of: picture) else {
            throw ClassifierError.unreadablePicture
        }
        return pixels
    }
}

/// Runs model.pte. Not thread-safe.
public final class ExecuTorchClassifier: Classifier {
    public let bundle: ModelBundle
    private let module: Module

    public init(bundle: ModelBundle) throws {
        self.bundle = bundle
        module = Module(filePath: bundle.file.path)
        try module.load("forward")
    }

    public func scores(of picture: CGImage) throws -> [Float] {
        let pixels = try pixels(of: picture)
        let output: Tensor<Float>
        if bundle.form.insideTheGraph {
            output = try module.forward(Tensor<UInt8>(pixels, shape: bundle.shape))
        } else {
            output = try module.forward(
                Tensor<Float>(bundle.normalised(pixels), shape: bundle.shape))
        }
        return output.scalars()
    }
}

/// Runs model.mlpackage.
public final class CoreMLClassifier: Classifier {
    public let bundle: ModelBundle
    private let model: MLModel

    public init(bundle: ModelBundle) async throws {
        self.bundle = bundle
        model = try MLModel(contentsOf: await MLModel.compileModel(at: bundle.file))
    }

    public func scores(of picture: CGImage) throws -> [Float] {
        let name = bundle.form.input.name
        let input = try MLDictionaryFeatureProvider(dictionary: [name: value(of: picture)])
        let output = try model.prediction(from: input).featureValue(for: bundle.form.output.name)
        if let found = output?.multiArrayValue {
            return (0..<found.count).map { found[$0].floatValue }
        }
        guard let table = output?.dictionaryValue else { throw ClassifierError.otherLabels }
        return try bundle.labels.map { label in
            guard let share = table[label] else { throw ClassifierError.otherLabels }
            return share.floatValue
        }
    }

    /// The model's input: a pixel buffer if the model takes an image, otherwise an array.
    private func value(of picture: CGImage) throws -> MLFeatureValue {
        let pixels = try pixels(of: picture)
        let input = model.modelDescription.inputDescriptionsByName[bundle.form.input.name]
        if let image = input?.imageConstraint {
            return MLFeatureValue(pixelBuffer: try buffer(of: pixels, image.pixelFormatType))
        }
        let array = try MLMultiArray(
            shape: bundle.shape.map { NSNumber(value: $0) }, dataType: .float32)
        for (at, number) in bundle.normalised(pixels).enumerated() {
            array[at] = NSNumber(value: number)
        }
        return MLFeatureValue(multiArray: array)
    }

    /// A pixel buffer of exactly these pixels. Given an image of another size, Core ML would crop
    /// and scale it differently from training, and not composite it over white.
    private func buffer(of pixels: [UInt8], _ format: OSType) throws -> CVPixelBuffer {
        let (side, channels) = (bundle.form.picture.height, bundle.form.picture.channels)
        var made: CVPixelBuffer?
        CVPixelBufferCreate(nil, side, side, format, nil, &made)
        guard let buffer = made else { throw ClassifierError.unreadablePicture }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        let memory = CVPixelBufferGetBaseAddress(buffer)!.assumingMemoryBound(to: UInt8.self)
        let stride = CVPixelBufferGetBytesPerRow(buffer)
        for at in 0..<side * side {
            let start = at / side * stride
            if channels == 1 {
                memory[start + at % side] = pixels[at]
            } else {  // BGRA
                for channel in 0..<3 {
                    memory[start + 4 * (at % side) + 2 - channel] = pixels[3 * at + channel]
                }
                memory[start + 4 * (at % side) + 3] = 255
            }
        }
        return buffer
    }
}

/// Probabilities; subtracts the largest score first, so that exp cannot overflow.
func softmax(_ scores: [Float]) -> [Float] {
    let largest = scores.max() ?? 0
    let powers = scores.map { exp($0 - largest) }
    let sum = powers.reduce(0, +)
    return powers.map { $0 / sum }
}
