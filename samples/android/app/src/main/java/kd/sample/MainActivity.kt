package kd.sample

import android.content.res.AssetManager
import android.graphics.Bitmap
import android.graphics.ColorSpace
import android.graphics.ImageDecoder
import android.net.Uri
import android.os.Bundle
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.activity.result.contract.ActivityResultContracts.GetContent
import java.io.File
import java.io.IOException
import kotlin.concurrent.thread
import kotlin.math.ceil
import kotlin.math.sqrt

/** In pixels, 4 bytes each in memory; larger images are decoded at 1/2, 1/3, ... of their size. */
private const val LARGEST = 50_000_000

/** One button: choose an image and see what each bundle in the app's assets predicts for it. */
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
            val picture = try {
                decoded(uri)
            } catch (error: IOException) {
                return@thread runOnUiThread { answer.text = "No picture: ${error.message}" }
            }
            val lines = assets.list("").orEmpty().filter(::isBundle).map { name ->
                val bundle = ModelBundle(copied(assets, name, File(filesDir, name)))
                classifier(bundle).use { opened ->
                    val pixels = pixels(picture, bundle)
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
        assets.list(name).orEmpty().any { it in setOf("model.pte", "model.onnx", "model.tflite") }

    private fun classifier(bundle: ModelBundle) = when (bundle.file.extension) {
        "pte" -> ExecuTorchClassifier(bundle)
        "onnx" -> OnnxClassifier(bundle)
        else -> LiteRTClassifier(bundle)
    }

    /** The image in sRGB, upright: ImageDecoder applies the EXIF orientation. */
    private fun decoded(uri: Uri): Bitmap =
        ImageDecoder.decodeBitmap(ImageDecoder.createSource(contentResolver, uri)) { decoder, info, _ ->
            decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE // which getPixels can read
            decoder.setTargetColorSpace(ColorSpace.get(ColorSpace.Named.SRGB))
            val times = info.size.width.toDouble() * info.size.height / LARGEST
            decoder.setTargetSampleSize(ceil(sqrt(times)).toInt()) // 1 unless it is huge
        }
}

/** The image at the bundle's size: bytes in height, width, channel order. */
fun pixels(picture: Bitmap, bundle: ModelBundle): ByteArray =
    pixels(picture.width, picture.height, bundle.side, bundle.channels) { y ->
        IntArray(picture.width).also {
            picture.getPixels(it, 0, picture.width, 0, y, picture.width, 1)
        }
    }

/** Copies an assets folder to the file system, since ExecuTorch opens paths. */
fun copied(assets: AssetManager, name: String, into: File): File {
    into.mkdirs()
    for (file in assets.list(name).orEmpty()) {
        assets.open("$name/$file").use { from ->
            File(into, file).outputStream().use { from.copyTo(it) }
        }
    }
    return into
}
