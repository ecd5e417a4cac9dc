package kd.sample

import android.content.res.AssetManager
import android.graphics.Bitmap
import android.graphics.ImageDecoder
import android.media.ThumbnailUtils
import android.net.Uri
import android.os.Bundle
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.activity.result.contract.ActivityResultContracts.GetContent
import java.io.File
import kotlin.concurrent.thread

/** One button: choose a picture, see what each bundle in the app's assets makes of it. */
class MainActivity : ComponentActivity() {
    private val choose = registerForActivityResult(GetContent()) { uri -> uri?.let(::classify) }
    private lateinit var answer: TextView

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        answer = TextView(this)
        val button = Button(this).apply {
            text = "Choose a picture"
            setOnClickListener { choose.launch("image/*") }
        }
        setContentView(
            LinearLayout(this).apply {
                orientation = LinearLayout.VERTICAL
                addView(button)
                addView(answer)
            }
        )
    }

    private fun classify(uri: Uri) {
        thread {
            val lines = assets.list("").orEmpty().filter(::isBundle).map { name ->
                val bundle = ModelBundle(copied(assets, name, File(filesDir, name)))
                classifier(bundle).use { opened ->
                    val pixels = pixels(decoded(uri), bundle)
                    val began = System.nanoTime()
                    val guess = opened.classify(pixels)
                    val took = (System.nanoTime() - began) / 1e6
                    "$name: ${guess.label} (${guess.probability}), %.2f ms".format(took)
                }
            }
            runOnUiThread { answer.text = lines.joinToString("\n") }
        }
    }

    private fun isBundle(name: String) =
        assets.list(name).orEmpty().any { it == "model.pte" || it == "model.onnx" }

    private fun classifier(bundle: ModelBundle) =
        if (bundle.file.extension == "pte") ExecuTorchClassifier(bundle) else OnnxClassifier(bundle)

    private fun decoded(uri: Uri): Bitmap =
        ImageDecoder.decodeBitmap(ImageDecoder.createSource(contentResolver, uri)) { decoder, _, _ ->
            decoder.isMutableRequired = true // in memory that getPixels can read
        }
}

/** A picture as the bundle wants it: centre crop, resize, RGB or grey. */
fun pixels(picture: Bitmap, bundle: ModelBundle): ByteArray {
    val square = ThumbnailUtils.extractThumbnail(picture, bundle.side, bundle.side)
    val colours = IntArray(bundle.side * bundle.side)
    square.getPixels(colours, 0, bundle.side, 0, 0, bundle.side, bundle.side)
    return ByteArray(colours.size * bundle.channels) { at ->
        val colour = colours[at / bundle.channels]
        val (red, green, blue) = listOf(16, 8, 0).map { colour shr it and 0xff }
        when {
            bundle.channels == 1 -> (299 * red + 587 * green + 114 * blue) / 1000
            else -> listOf(red, green, blue)[at % 3]
        }.toByte()
    }
}

/** The files of an assets folder, as files: ExecuTorch opens paths. */
fun copied(assets: AssetManager, name: String, into: File): File {
    into.mkdirs()
    for (file in assets.list(name).orEmpty()) {
        assets.open("$name/$file").use { from ->
            File(into, file).outputStream().use { from.copyTo(it) }
        }
    }
    return into
}
