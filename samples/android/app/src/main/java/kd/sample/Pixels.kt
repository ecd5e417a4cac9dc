package kd.sample

import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min

/**
 * Preprocesses an image of any size as in training: composited over white, converted to grey by
 * luminance if need be, centre-cropped to a square, resized by an antialiased triangle filter.
 *
 * Each byte is within 1 of classify.py's. Android's own scaling is not antialiased, so it differs
 * more.
 *
 * [row] returns a row's pixels as Android colour ints (ARGB, not premultiplied).
 * Returns bytes in height, width, channel order.
 */
fun pixels(width: Int, height: Int, side: Int, channels: Int, row: (Int) -> IntArray): ByteArray {
    val square = min(width, height)
    val across = taps(width, square, side)
    val down = taps(height, square, side)
    val narrow = arrayOfNulls<IntArray>(height) // filled only for the square's rows
    for (y in down.first().from until down.last().run { from + weights.size })
        narrow[y] = row(y).let { colours ->
            IntArray(side * channels) { at ->
                across[at / channels].sum { channel(colours[it], at % channels, channels) }
            }
        }
    return ByteArray(side * side * channels) { at ->
        down[at / (side * channels)].sum { narrow[it]!![at % (side * channels)] }.toByte()
    }
}

/** The input pixels of one output pixel, starting at [from], and their weights in 2^-22. */
private class Tap(val from: Int, val weights: IntArray) {
    inline fun sum(value: (Int) -> Int): Int {
        var sum = 1 shl 21
        for (at in weights.indices) sum += weights[at] * value(from + at)
        return (sum shr 22).coerceIn(0, 255)
    }
}

private fun taps(length: Int, square: Int, side: Int): List<Tap> {
    val scale = square.toDouble() / side
    val reach = max(scale, 1.0)
    return List(side) { at ->
        val centre = (length - square) / 2.0 + (at + 0.5) * scale
        val from = max(0, (centre - reach + 0.5).toInt())
        val to = min(length, (centre + reach + 0.5).toInt())
        val shares = DoubleArray(to - from) {
            max(0.0, 1 - abs((from + it - centre + 0.5) / reach))
        }
        val sum = shares.sum()
        Tap(from, IntArray(shares.size) { (0.5 + shares[it] / sum * (1 shl 22)).toInt() })
    }
}

/** Red, green or blue composited over white, or luminance by Pillow's formula. */
private fun channel(colour: Int, channel: Int, channels: Int): Int {
    val opacity = colour ushr 24
    fun over(shift: Int) =
        ((colour shr shift and 0xff) * opacity + 255 * (255 - opacity) + 127) / 255
    if (channels == 3) return over(16 - 8 * channel)
    return (19595 * over(16) + 38470 * over(8) + 7471 * over(0) + 0x8000) shr 16
}
