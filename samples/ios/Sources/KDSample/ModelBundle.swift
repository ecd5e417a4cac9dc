import CoreGraphics
import Foundation

/// A bundle's folder: the exported file, its labels and its preprocessing.
public struct ModelBundle {
    public let file: URL
    public let labels: [String]
    public let form: Form

    /// The contents of preprocessing.json.
    public struct Form: Decodable {
        public struct Picture: Decodable {
            public let height: Int
            public let width: Int
            public let channels: Int
        }
        public struct Tensor: Decodable {
            public let name: String
        }
        public let file: String
        public let picture: Picture
        /// Whether the model takes raw pixels and returns probabilities, not logits.
        public let insideTheGraph: Bool
        public let mean: [Float]
        public let std: [Float]
        public let input: Tensor
        public let output: Tensor
    }

    public init(folder: URL) throws {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        let record = try Data(contentsOf: folder.appending(path: "preprocessing.json"))
        form = try decoder.decode(Form.self, from: record)
        file = folder.appending(path: form.file)
        let names = try String(contentsOf: folder.appending(path: "labels.txt"), encoding: .utf8)
        labels = names.components(separatedBy: "\n").dropLast()
    }

    /// The input shape for one image.
    public var shape: [Int] {
        let picture = form.picture
        return form.insideTheGraph
            ? [1, picture.height, picture.width, picture.channels]
            : [1, picture.channels, picture.height, picture.width]
    }

    /// (pixel / 255 - mean) / std, channels first, from pixels in height, width, channel order.
    public func normalised(_ pixels: [UInt8]) -> [Float] {
        let area = form.picture.height * form.picture.width
        return pixels.indices.map { at in
            let channel = at / area
            let pixel = Float(pixels[at % area * form.picture.channels + channel])
            return (pixel / 255 - form.mean[channel]) / form.std[channel]
        }
    }

    /// The image at the bundle's size, as bytes in height, width, channel order; nil if it cannot
    /// be drawn.
    public func pixels(of picture: CGImage) -> [UInt8]? {
        fitted(picture, side: form.picture.height, channels: form.picture.channels)
    }
}
