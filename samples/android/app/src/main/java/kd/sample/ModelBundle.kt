package kd.sample

import org.json.JSONArray
import org.json.JSONObject
import java.io.File

/** A bundle's folder: the exported file, its labels and its preprocessing. */
class ModelBundle(folder: File) {
    private val form = JSONObject(File(folder, "preprocessing.json").readText())
    private val picture = form.getJSONObject("picture")
    private val input = form.getJSONObject("input")
    private val output = form.getJSONObject("output")

    val file = File(folder, form.getString("file"))
    val labels: List<String> = File(folder, "labels.txt").readText().split("\n").dropLast(1)
    val side: Int = picture.getInt("height")
    val channels: Int = picture.getInt("channels")

    /** Whether the model takes raw pixels and returns probabilities, not logits. */
    val insideTheGraph: Boolean = form.getBoolean("inside_the_graph")
    val inputName: String = input.getString("name")
    val outputName: String = output.getString("name")

    /** The input shape for one image. */
    val shape: LongArray =
        if (insideTheGraph) longArrayOf(1, side.toLong(), side.toLong(), channels.toLong())
        else longArrayOf(1, channels.toLong(), side.toLong(), side.toLong())

    private val mean = floats(form.getJSONArray("mean"))
    private val std = floats(form.getJSONArray("std"))

    /** (pixel / 255 - mean) / std, channels first; [pixels] in height, width, channel order. */
    fun normalised(pixels: ByteArray): FloatArray {
        val area = side * side
        return FloatArray(pixels.size) { at ->
            val channel = at / area
            val pixel = pixels[at % area * channels + channel].toInt() and 0xff
            (pixel / 255f - mean[channel]) / std[channel]
        }
    }

    private fun floats(numbers: JSONArray) =
        FloatArray(numbers.length()) { numbers.getDouble(it).toFloat() }
}
