import CoreGraphics
import Foundation

/// A bundle's folder: the exported file, its labels, and how a picture becomes its input.
public struct ModelBundle {
    public let file: URL
    public let labels: [String]
    public let form: Form

    /// What preprocessing.json says.
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
        /// Whether the file takes pictures as they are, and gives probabilities.
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

    /// One picture's shape as the file takes it.
    public var shape: [Int] {
        let picture = form.picture
        return form.insideTheGraph
            ? [1, picture.height, picture.width, picture.channels]
            : [1, picture.channels, picture.height, picture.width]
    }

    /// (pixel / 255 - mean) / std, channels first, of pixels in the order height, width, channels.
    public func normalised(_ pixels: [UInt8]) -> [Float] {
        let area = form.picture.height * form.picture.width
        return pixels.indices.map { at in
            let channel = at / area
            let pixel = Float(pixels[at % area * form.picture.channels + channel])
            return (pixel / 255 - form.mean[channel]) / form.std[channel]
        }
    }

    /// A picture's bytes in the order height, width, channels: centre crop, resize, RGB or grey.
    public func pixels(of picture: CGImage) -> [UInt8]? {
        let (width, height) = (form.picture.width, form.picture.height)
        let grey = form.picture.channels == 1
        let stored = grey ? 1 : 4
        let shorter = CGFloat(min(picture.width, picture.height))
        let crop = CGRect(
            x: (CGFloat(picture.width) - shorter) / 2, y: (CGFloat(picture.height) - shorter) / 2,
            width: shorter, height: shorter)
        var bytes = [UInt8](repeating: 255, count: width * height * stored)
        let drawn = bytes.withUnsafeMutableBytes { memory -> Bool in
            guard
                let square = picture.cropping(to: crop),
                let context = CGContext(
                    data: memory.baseAddress, width: width, height: height, bitsPerComponent: 8,
                    bytesPerRow: width * stored,
                    space: grey ? CGColorSpaceCreateDeviceGray() : CGColorSpaceCreateDeviceRGB(),
                    bitmapInfo: grey
                        ? CGImageAlphaInfo.none.rawValue : CGImageAlphaInfo.noneSkipLast.rawValue)
            else { return false }
            context.interpolationQuality = .medium
            context.draw(square, in: CGRect(x: 0, y: 0, width: width, height: height))
            return true
        }
        guard drawn else { return nil }
        return grey ? bytes : bytes.indices.filter { $0 % 4 != 3 }.map { bytes[$0] }
    }
}
