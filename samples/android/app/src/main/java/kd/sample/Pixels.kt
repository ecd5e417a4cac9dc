package kd.sample

import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min

/**
 * A picture of any size as the student learned to see it: transparency over white, grey by
 * luminance, the centre square resized by a triangle filter as wide as a pixel of the result.
 *
 * The bytes that classify.py makes, give or take one. Android's own scaling interpolates between few
 * pixels, however many become one, and so gives others.
 *
 * [row] gives a row's pixels as Android's colours (ARGB, not premultiplied).
 * Returns bytes in the order height, width, channels.
 */
fun pixels(width: Int, height: Int, side: Int, channels: Int, row: (Int) -> IntArray): ByteArray {
    val square = min(width, height)
    val across = taps(width, square, side)
    val down = taps(height, square, side)
    val narrow = arrayOfNulls<IntArray>(height) // only the rows that the square has
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

/** The pixels that one of the result is made of, from [from] on, and their weights in 2^-22. */
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

/** Red, green or blue over white, or the luminance that Pillow gives. */
private fun channel(colour: Int, channel: Int, channels: Int): Int {
    val opacity = colour ushr 24
    fun over(shift: Int) =
        ((colour shr shift and 0xff) * opacity + 255 * (255 - opacity) + 127) / 255
    if (channels == 3) return over(16 - 8 * channel)
    return (19595 * over(16) + 38470 * over(8) + 7471 * over(0) + 0x8000) shr 16
}
