import CoreGraphics

/// Preprocesses an image of any size as in training: composited over white, converted to grey by
/// luminance if need be, centre-cropped to a square, resized by an antialiased triangle filter.
/// Each byte is within 1 of classify.py's.
///
/// A CGImage has no orientation: rotate camera images upright first.
///
/// - Returns: bytes in height, width, channel order; nil if the image cannot be drawn.
func fitted(_ picture: CGImage, side: Int, channels: Int) -> [UInt8]? {
    let (width, height) = (picture.width, picture.height)
    var colours = [UInt8](repeating: 255, count: 4 * width * height)  // white background
    let drawn = colours.withUnsafeMutableBytes { memory -> Bool in
        guard
            let space = CGColorSpace(name: CGColorSpace.sRGB),
            let context = CGContext(
                data: memory.baseAddress, width: width, height: height, bitsPerComponent: 8,
                bytesPerRow: 4 * width, space: space,
                bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
        else { return false }
        context.draw(picture, in: CGRect(x: 0, y: 0, width: width, height: height))
        return true
    }
    guard drawn else { return nil }

    let square = min(width, height)
    let (across, down) = (taps(width, square, side), taps(height, square, side))
    let row = side * channels
    var narrow = [UInt8](repeating: 0, count: height * row)
    for y in 0..<height {
        for at in 0..<row {
            narrow[y * row + at] = across[at / channels].sum { x in
                let pixel = 4 * (y * width + x)
                if channels == 3 { return Int(colours[pixel + at % 3]) }
                let (red, green) = (Int(colours[pixel]), Int(colours[pixel + 1]))
                return (19595 * red + 38470 * green + 7471 * Int(colours[pixel + 2]) + 0x8000) >> 16
            }
        }
    }
    return (0..<side * row).map { at in
        down[at / row].sum { y in Int(narrow[y * row + at % row]) }
    }
}

/// The input pixels of one output pixel, starting at `from`, and their weights in 2^-22.
private struct Tap {
    let from: Int
    let weights: [Int]

    func sum(_ value: (Int) -> Int) -> UInt8 {
        var sum = 1 << 21
        for (at, weight) in weights.enumerated() { sum += weight * value(from + at) }
        return UInt8(min(max(sum >> 22, 0), 255))
    }
}

private func taps(_ length: Int, _ square: Int, _ side: Int) -> [Tap] {
    let scale = Double(square) / Double(side)
    let reach = max(scale, 1)
    return (0..<side).map { at in
        let centre = Double(length - square) / 2 + (Double(at) + 0.5) * scale
        let from = max(0, Int(centre - reach + 0.5))
        let to = min(length, Int(centre + reach + 0.5))
        let shares = (from..<to).map { max(0, 1 - abs((Double($0) - centre + 0.5) / reach)) }
        let sum = shares.reduce(0, +)
        return Tap(from: from, weights: shares.map { Int(0.5 + $0 / sum * Double(1 << 22)) })
    }
}
